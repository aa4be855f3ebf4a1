"""The command line: `udddm COMMAND`, and `udddm-train`, `udddm-sample`, `udddm-evaluate`, `udddm-store`.

Heavy modules are imported only after the arguments are parsed, which keeps `--help` fast.
"""
