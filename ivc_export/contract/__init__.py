"""The contract between graphs and runtimes. It is data only; all other code takes its names from here."""
