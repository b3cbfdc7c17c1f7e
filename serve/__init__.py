"""A checkpoint goes in, an endpoint and measured numbers come out."""
