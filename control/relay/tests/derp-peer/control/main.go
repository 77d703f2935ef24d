// control-server is the control server of our tests with stock tailscaled: the one with which Tailscale
// tests tailscaled, unmodified, at the version that go.mod pins. Everybody may register. Its DERP map is
// one relay.
//
//	control-server LISTEN RELAY-IP RELAY-NAME
package main

import (
	"fmt"
	"log"
	"net/http"
	"os"

	"tailscale.com/tailcfg"
	"tailscale.com/tstest/integration/testcontrol"
)

const region = 900

func main() {
	if len(os.Args) != 4 {
		log.Fatal("usage: control-server LISTEN RELAY-IP RELAY-NAME")
	}
	listen, relay, name := os.Args[1], os.Args[2], os.Args[3]
	server := &testcontrol.Server{
		ExplicitBaseURL:  "http://" + listen,
		AllNodesSameUser: true,
		AllOnline:        true,
		DERPMap: &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{region: {
			RegionID:   region,
			RegionCode: "lab",
			RegionName: "lab",
			Nodes: []*tailcfg.DERPNode{{
				Name:      "lab-1",
				RegionID:  region,
				HostName:  name,
				IPv4:      relay,
				IPv6:      "none",
				CanPort80: true,
			}},
		}}},
	}
	fmt.Println("serving", listen)
	log.Fatal(http.ListenAndServe(listen, server))
}
