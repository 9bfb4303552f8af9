"""Process group set-up and collectives; everything above is given a group."""
