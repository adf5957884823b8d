"""The listener contract, the commit, and one file or folder per source."""
