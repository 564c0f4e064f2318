import sys

from edge_speq.cli import main

sys.exit(main())
