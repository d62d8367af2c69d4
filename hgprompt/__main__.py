"""python -m hgprompt"""

from hgprompt.cli import main

if __name__ == "__main__":
    main()
