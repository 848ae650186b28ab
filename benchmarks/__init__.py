"""How fast ipguard is, side by side with what an adopter might use instead: `dev.py bench`."""
