"""python -m hgprompt.cli"""

from hgprompt.cli import main

main()
