"""The command line: `udddm`, and `udddm-train`, `udddm-sample`, `udddm-evaluate`, `udddm-store`.

Heavy imports wait until the arguments are parsed.
"""
