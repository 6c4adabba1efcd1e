"""Classic bugs to plant in the source, and the checks that must find them: see README.md."""
