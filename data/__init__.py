"""From pictures to what training reads: picture sources, codecs, the feature cache and its order."""
