"""What makes a compensated checkpoint one that an engine loads without this package."""
