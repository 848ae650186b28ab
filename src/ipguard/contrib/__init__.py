"""Kits for frameworks. Import the one that you need; it imports its framework."""
