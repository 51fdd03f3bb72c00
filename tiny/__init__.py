"""What only the small preset on two CPU cores needs; nothing here is in the paper. See tiny/README.md."""
