"""The contract between the graphs and whatever runs them: data alone, from which everything else takes its names."""
