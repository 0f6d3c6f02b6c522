"""Train one expert per cluster, and the single LoRA.

python jobs/experts.py RECIPE ... runs up to this stage and skips what is done.
"""

import sys

from gradientspace_ray.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["run", "--until", "experts"]
    main()
