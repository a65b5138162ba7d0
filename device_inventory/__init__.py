"""Declares which devices there are: data without behaviour."""

from device_inventory.inventory import Device, Inventory, InventoryError

__all__ = ["Device", "Inventory", "InventoryError"]
