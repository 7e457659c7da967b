"""What ranks are, how they meet, and what they say to each other."""
