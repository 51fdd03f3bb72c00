"""What only the small preset on two CPU cores needs; nothing of the paper. See tiny/README.md."""
