"""Who quantizes: every toolkit, and quantizers for the studies."""
