"""What the demo, the benchmarks and the tests of real toolkits share; no part of the package."""
