"""What evaluate.py measures with, one file a kind. Nothing trained here measures anything here."""
