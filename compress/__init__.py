"""A dense model goes in, a verified 2:4 checkpoint comes out."""
