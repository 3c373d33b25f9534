// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.Linq;
using FluentAssertions;
using Vmm.Core;
using Vmm.Devices.Input;
using Vmm.Devices.Pci;
using Vmm.Devices.Virtio;
using Xunit;

namespace Vmm.Devices.Tests;

public sealed class DeviceCatalogTests
{
    [Fact]
    public void Catalog_ComparedWithTheAssembly_ListsEveryModelOnItsBus()
    {
        Type[] models = typeof(DeviceCatalog).Assembly.GetTypes()
            .Where(t => t is { IsClass: true, IsAbstract: false, IsNested: false } &&
                (typeof(IDevice).IsAssignableFrom(t) || typeof(IVirtioModel).IsAssignableFrom(t) ||
                typeof(UsbHidDevice).IsAssignableFrom(t)))
            .ToArray();
        models.Length.Should().BeGreaterThan(25);
        foreach (Type model in models)
        {
            DeviceBus bus = typeof(PciFunction).IsAssignableFrom(model) ? DeviceBus.Pci
                : typeof(UsbHidDevice).IsAssignableFrom(model) ? DeviceBus.Usb
                : typeof(IVirtioModel).IsAssignableFrom(model) ? DeviceBus.Virtio
                : DeviceBus.Board;
            DeviceCatalog.Find(model.Name).Should().NotBeNull("{0} is a device", model.Name);
            DeviceCatalog.Find(model.Name)!.Bus.Should().Be(bus, "{0}", model.Name);
        }

        DeviceCatalog.All.Select(e => e.Model).Should().OnlyHaveUniqueItems();
    }
}
