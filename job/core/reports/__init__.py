"""What people and scripts read in the end: the report, what to do next, what trackers and exports say."""
