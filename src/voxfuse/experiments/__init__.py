"""The papers' claims, measured: each experiment is a module of runs, rows and pages."""
