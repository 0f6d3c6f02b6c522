"""Fit and calibrate the router, and write the registry.

python jobs/router.py RECIPE ... runs up to this stage and skips what is done.
"""

import sys

from gradientspace_ray.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["run", "--until", "router"]
    main()
