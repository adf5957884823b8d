"""The listener contract, the commit, and one file per source."""
