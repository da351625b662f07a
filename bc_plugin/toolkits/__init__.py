"""What the patches of all toolkits share."""
