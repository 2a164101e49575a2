"""Types that cross package borders. Imports the standard library only."""
