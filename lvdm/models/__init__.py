"""The networks, and the frozen models of other libraries around them. Nothing here knows ranks or training flags."""
