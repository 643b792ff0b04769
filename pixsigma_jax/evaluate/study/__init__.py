"""Studies of preference: a website for people, their answers, and what these say."""
