import sys

from uniref_fast.cli import main

sys.exit(main())
