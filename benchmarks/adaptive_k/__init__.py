"""What adaptive k costs and gains: policies, their speed, and a controller under load."""
