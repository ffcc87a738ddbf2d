import sys

from ept.cli.main import main

sys.exit(main())
