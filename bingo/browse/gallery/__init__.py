"""The gallery: one offline page through which all bags of an index can be browsed."""
