"""What a sparse model gained and what it lost, always beside the dense one."""
