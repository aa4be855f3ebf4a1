"""Behind `udddm data` and `udddm train DATA`: what a path or URL holds, and tools for data sets."""
