"""The method: sites, the mean of their shift, and what is made of it."""
