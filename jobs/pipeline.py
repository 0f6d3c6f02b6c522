"""Run a recipe from dataset to router, on the Ray cluster that submits it or on a local one.

ray job submit --working-dir . -- python jobs/pipeline.py RECIPE [--run-dir URI] [--set a.b=c] [--until STAGE]
"""

import sys

from gradientspace_ray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "run")
    main()
