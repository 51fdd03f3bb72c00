"""The scripts lie flat in the repository's root; make them importable from here."""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
