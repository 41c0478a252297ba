"""What this machine is: GPU, Jetson, sensors; reads only."""
