"""Everything that ends in faces: aligned crops uint8 (N,112,112,3) BGR."""
