"""Pure functions of arrays. They know no config."""
