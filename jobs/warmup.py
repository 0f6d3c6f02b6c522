"""Train the generalist on the whole mixture.

python jobs/warmup.py RECIPE ... runs up to this stage and skips what is done.
"""

import sys

from gradientspace_ray.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["run", "--until", "warmup"]
    main()
