"""This machine: GPU, Jetson, sensors; reads only."""
