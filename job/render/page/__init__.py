"""The report as one file for a browser: self-contained, bounded, and whatever it shows is text."""
