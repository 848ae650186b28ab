"""Kits for web frameworks. Import the one you need; each imports its framework, `ipguard` none."""
