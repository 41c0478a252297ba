"""Every file that edgemoe reads, damaged in many ways: what do the commands say?"""
