"""Files, locks, processes and texts. Imports no torch; the launchers use it too."""
