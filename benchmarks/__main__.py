import sys

from benchmarks.harness import runner

if __name__ == "__main__":
    sys.exit(runner.main())
