"""Loading, detecting, aligning and checking faces: everything that yields aligned crops uint8 (N,112,112,3) BGR."""
