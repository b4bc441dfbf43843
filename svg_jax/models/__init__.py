"""The networks: one file each, readable top to bottom, its released sizes as named configs."""
