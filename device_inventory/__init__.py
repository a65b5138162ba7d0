"""Which devices there are: declared data without behaviour."""

from device_inventory.inventory import Device, Inventory, InventoryError

__all__ = ["Device", "Inventory", "InventoryError"]
